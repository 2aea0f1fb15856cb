"""Object boxes from what `--data` names: a COCO json file, a JSON-lines file, or a folder of images.

All three end as one `BoxTable` of compact arrays. What cannot be used is left out, counted by reason, and
shown with its first culprit; what is wrong with the file as a whole is a UserError. Boxes belong to the
upright image, EXIF orientation applied, as labelling tools show it.
"""

from locus_fast.data.read import read_boxes
from locus_fast.data.table import BoxTable, Dropped

__all__ = ["BoxTable", "Dropped", "read_boxes"]
