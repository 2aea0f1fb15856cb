"""What a run writes into its folder: checkpoints, and `final/` at its end. Neither is ever written of weights
that are not finite, or that answer a held-out cue with states that are not."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from locus_fast.errors import UserError
from locus_fast.model.packing import PromptBatch
from locus_fast.model.policy import prefill
from locus_fast.run.folder import FINAL
from locus_fast.run.interrupt import Interrupt
from locus_fast.run.model import open_model
from locus_fast.run.resume import layout_of
from locus_fast.run.setup import Setup
from locus_fast.step.budget import make_room
from locus_fast.step.optimizers import state_tensors
from locus_fast.weights.checkpoint import (
    checkpoints,
    damaged,
    load_checkpoint,
    load_saved_weights,
    save_adapters,
    save_checkpoint,
    save_model,
)
from locus_fast.weights.finite import first_not_finite

NOTHING = "nothing new is done yet, so there is nothing to save;"


def name_of(step: int) -> str:
    """The folder of a checkpoint, in that of its run."""
    return f"checkpoints/step-{step:06d}"


class Saver:
    """Saves the state of a run into its folder `out`, and keeps what a Ctrl-C is answered with true.
    final_due: of the steps that were done before, there is no `final/` yet."""

    def __init__(
        self, setup: Setup, optimizer: torch.optim.Optimizer, out: Path, stop: Interrupt, final_due: bool
    ):
        self.setup, self.optimizer, self.out = setup, optimizer, out
        self.stop, self.final_due = stop, final_due
        self.trained = layout_of(setup.config, setup.engine.model.dtype)
        self.probe = setup.inputs.prompter(setup.inputs.cues.held_out(0))

    def restore(self, checkpoint: Path | None) -> None:
        """Takes the weights and the optimizer's state of a checkpoint, None for none. Raises UserError if it
        is not whole, or not finite."""
        if checkpoint:
            load_checkpoint(checkpoint, self.setup.engine.model, self.optimizer)
            if fault := self.fault():
                raise damaged(checkpoint, fault)

    def expect(self, done: int) -> None:
        """What a Ctrl-C leads to from now on, when so many steps are done."""
        saved = f"the steps that are done then, {done} or {done + 1}, are saved in checkpoints/ and {FINAL}/"
        saved = saved if done else "nothing is saved, unless step 1 is done then"
        self.stop.promise = f"it ends after the microbatch at hand; {saved}"

    def fault(self) -> str | None:
        """What is not finite, in words: a trained weight, the optimizer's state, or what a held-out prompt
        leaves for its reply. None if all is well."""
        weights = [
            (f"the weight {name}", p)
            for name, p in self.setup.engine.model.named_parameters()
            if p.requires_grad
        ]
        state = [
            (f"the optimizer's state {name}", tensor)
            for name, tensor in state_tensors(self.optimizer).items()
        ]
        if name := first_not_finite([*weights, *state]):
            return f"{name} is not finite"
        try:
            states = self._states()
        except torch.OutOfMemoryError:
            states = None
            make_room(self.setup.engine.decoder)
            # then nothing is known against it, and saving needs no memory
            with suppress(torch.OutOfMemoryError):
                states = self._states()
        return f"the model answers with {states} that are not finite" if states else None

    @torch.no_grad()
    def _states(self) -> str | None:
        """The first part of a held-out prompt's forward pass that is not finite: keys or values of a layer,
        or the logits."""
        model = self.setup.engine.model
        training = model.training
        model.eval()
        try:
            prefix = prefill(model, PromptBatch.of([self.probe], model.config, self.setup.engine.device))
            states = [("logits", model.lm_head(prefix.last_hidden))]
            for layer, (keys, values) in reversed(prefix.kv.items()):
                states = [(f"keys of layer {layer}", keys), (f"values of layer {layer}", values), *states]
            return first_not_finite(states)
        finally:
            model.train(training)

    def checkpoint(self, step: int) -> None:
        """Saves the state after so many steps. Nothing is done if it is saved already, or if it is of no use:
        the steps that follow will show it."""
        if not (self.out / name_of(step)).exists() and self.fault() is None:
            self._write_checkpoint(step)

    def end(self, begun: int, done: int, failure: Exception | None) -> None:
        """Saves the end of a run that began after `begun` steps and ended after `done`, perhaps in a failure.
        A run that was stopped before its first step leaves nothing. Raises the failure, with what is to be
        said of the save."""
        words = None
        if done > begun or (self.final_due and (begun or failure)):
            try:
                words = self.finish(done)
            except UserError as error:
                words = str(error)
        if failure and not isinstance(failure, UserError):
            raise failure
        if sentences := [str(said) for said in (failure, words) if said]:
            raise UserError(" ".join(sentences))

    def finish(self, step: int) -> str | None:
        """Saves the state after so many steps as a checkpoint, if there is none of it, and as `final/`. If it
        is of no use, `final/` is of the last checkpoint, else of the base; returned are then the words that
        say so."""
        fault = self.fault()
        if fault is None:
            if not (self.out / name_of(step)).exists():
                self._write_checkpoint(step)
            self._export(self.setup.engine.model)
            return None
        what = f"After step {step} {fault}, so that state is not saved"
        if found := checkpoints(self.out):
            load_saved_weights(found[-1][0], self.setup.engine.model)
            self._export(self.setup.engine.model)
            return (
                f"{what}: {self.out / FINAL} holds that of step {found[-1][1]}; lower --lr, and go on from "
                "there with --resume."
            )
        self._export(self._base())
        return (
            f"{what}: {self.out / FINAL} holds the base, since there is no checkpoint; start again with a "
            "lower --lr."
        )

    def _base(self) -> Any:
        """The model as it was before the first step, in host memory."""
        config = replace(self.setup.config, quantize="off")
        return open_model(config, self.setup.origin.source, torch.device("cpu"), self.setup.origin.role)

    def _write_checkpoint(self, step: int) -> None:
        with self.stop.saving(name_of(step), then=f"{FINAL}/ is saved, and it ends"):
            save_checkpoint(
                self.out,
                self.setup.engine.model,
                self.setup.origin.source.folder,
                self.optimizer,
                step,
                self.trained,
            )

    def _export(self, model: Any) -> None:
        config = self.setup.config
        limits = config.image_pixels if config.export_limits else None
        with self.stop.saving(f"{FINAL}/"):
            if config.export == "adapter":
                save_adapters(model, self.setup.origin.base, self.out / FINAL)
            else:
                save_model(model, self.setup.origin.source.folder, self.out / FINAL, limits=limits)
