"""Settings of the measurement of loaders, `recipes/measure_loading.py`. Torch-free."""

from dataclasses import dataclass

from dinalrm_align.train.settings import check_fields, check_integer


@dataclass
class LoadingRun:
    """Everything `python recipes/measure_loading.py` can be told.

    Args:
        output_dir: gets the data, written once in both layouts, and loading.json.
        pairs: how many.
        row_group: rows of a parquet row group; the released data has about 100.
        height: of the pictures, in pixels.
        width: the same.
        text_tokens: of a prompt's embeddings; SD3's two CLIP towers give 77 and T5 128.
        text_width: of them.
        prompts: distinct ones.
        batch_size: pairs a batch.
        prefetch: batches that are read ahead.
        seconds: how long each way is measured, or one epoch where that is shorter.
        seed: of the data and their order.
    """

    output_dir: str = "runs/measure_loading"
    pairs: int = 300
    row_group: int = 100
    height: int = 1024
    width: int = 1024
    text_tokens: int = 205
    text_width: int = 4096
    prompts: int = 100
    batch_size: int = 4
    prefetch: int = 4
    seconds: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("pairs", "row_group", "text_tokens", "text_width", "prompts", "batch_size", "prefetch"):
            check_integer(name, vars(self)[name], low=1)
        check_integer("seed", self.seed)
        for name in ("height", "width"):
            if vars(self)[name] < 16 or vars(self)[name] % 16:
                raise ValueError(f"{name}: got {vars(self)[name]} pixels; expected a positive multiple of 16")
        if self.pairs < self.batch_size or self.seconds <= 0:
            raise ValueError(
                f"got pairs {self.pairs}, batch_size {self.batch_size}, seconds {self.seconds}; expected at least a "
                "batch of pairs, and more than 0 seconds"
            )
