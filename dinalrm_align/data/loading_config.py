"""Settings of `recipes/measure_loading.py`. Torch-free."""

from dataclasses import dataclass

from dinalrm_align.train.settings import NonNegativeInt, PositiveFloat, PositiveInt, check_fields


@dataclass
class LoadingRun:
    """Settings of `python recipes/measure_loading.py`.

    Args:
        output_dir: folder of the data, written once in both layouts, and of loading.json.
        pairs: number of pairs.
        row_group: rows per parquet row group; the released data has about 100.
        height: of the images, in pixels.
        width: of the images, in pixels.
        text_tokens: length of a prompt's embeddings; SD3: 77 of the CLIP towers and 128 of T5.
        text_width: width of a prompt's embeddings.
        prompts: number of distinct prompts.
        batch_size: pairs per batch.
        prefetch: number of batches read ahead.
        seconds: longest time to measure each way; at most one epoch is read.
        seed: of the data and their order.
    """

    output_dir: str = "runs/measure_loading"
    pairs: PositiveInt = 300
    row_group: PositiveInt = 100
    height: PositiveInt = 1024
    width: PositiveInt = 1024
    text_tokens: PositiveInt = 205
    text_width: PositiveInt = 4096
    prompts: PositiveInt = 100
    batch_size: PositiveInt = 4
    prefetch: PositiveInt = 4
    seconds: PositiveFloat = 20.0
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("height", "width"):
            if vars(self)[name] % 16:
                raise ValueError(f"{name}: got {vars(self)[name]}; expected a multiple of 16")
        if self.pairs < self.batch_size:
            raise ValueError(f"pairs: got {self.pairs}; expected at least batch_size {self.batch_size}")
