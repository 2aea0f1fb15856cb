"""Teach a vision-language model to find small things: cue search with GRPO and one prefill a group."""
