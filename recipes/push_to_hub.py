"""Upload what a finished run trained to the Hugging Face hub, with a model card.

    python recipes/push_to_hub.py runs/refl_sd35_dinalrm_seed0 OWNER/NAME
    python recipes/push_to_hub.py runs/refl_sd35_dinalrm_seed0 OWNER/NAME --lora lora_best --private
    python recipes/push_to_hub.py runs/train_reward_sd35_seed0 OWNER/NAME

The run is one of an alignment recipe, whose LoRA is uploaded, or of train_reward, whose reward is. The repository also
gets the figures, the settings and summary.json. The model card tells base model, method, reward, gold scores, licence,
and how to load the weights. Log in first with `hf auth login`. The option --push_to_hub OWNER/NAME of these recipes
uploads at the end of training. --dry_run FOLDER writes the files to a new folder instead.
"""

from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.config import PushRun
from dinalrm_align.train.command import parse, refusing


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        config, _ = parse(PushRun, __doc__, argv, positional="run_and_repository")
        run, repository = config.run_and_repository
        from dinalrm_align.align.publish import push_run, write_repository
        from dinalrm_align.train.files import make_folder
        from dinalrm_align.train.hub import check_repository

        check_repository(repository)
        if config.dry_run is not None:
            make_folder(folder := Path(config.dry_run))
            write_repository(Path(run), folder, repository, lora=config.lora)
            print(f"wrote {folder}")
        else:
            push_run(Path(run), repository, lora=config.lora, private=config.private or None)


if __name__ == "__main__":
    main()
