"""Settings of `recipes/savings.py`. Torch-free."""

from dataclasses import dataclass

from dinalrm_align.train.settings import check_fields, check_integer


@dataclass
class SavingsRun:
    """Everything `python recipes/savings.py` can be told.

    Args:
        size: of the pictures, in pixels, square.
        batch: samples in one update, or scored at once.
        text_length: T5 tokens per prompt; CLIP's 77 come before them.
        levels: noise levels of the latent reward's ensemble, K.
        economies: also count one ReFL update under each option that makes it smaller.
        workers: processes that count; each takes one core and about 1 GB.
        measure: run the same on this machine's CUDA GPU, with random weights, and set it beside what was counted.
        warmup: unmeasured runs of each, with measure.
        repeats: measured runs of each, of which the median is taken, with measure.
        output_dir: gets savings.md, savings.json and savings.png.
    """

    size: int = 1024
    batch: int = 1
    text_length: int = 128
    levels: int = 1
    economies: bool = True
    workers: int = 2
    measure: bool = False
    warmup: int = 2
    repeats: int = 5
    output_dir: str = "runs/savings"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("batch", "workers", "repeats"):
            check_integer(name, vars(self)[name], low=1)
        check_integer("warmup", self.warmup, low=0)
        check_integer("levels", self.levels, low=1, high=8)
        check_integer("text_length", self.text_length, low=1, high=512)
        if self.size < 64 or self.size % 16 or self.size > 6144:
            raise ValueError(f"size: got {self.size} pixels; expected a multiple of 16 from 64 to 6144")
