"""A run's adapter on the Hub."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import create_repo, upload_folder
from peft import PeftConfig

from alpaca_helpers import AlpacaError
from alpaca_helpers.card import published
from alpaca_helpers.files import CARD, write_checksums
from alpaca_helpers.hub import first_line
from alpaca_helpers.lora import name_base


def push_adapter(adapter: Path, repository: str) -> str:
    """Upload the adapter's folder to the Hub and return its address; a new repository is private.

    A base that is a folder of this machine is named there without its path. Raises AlpacaError where the Hub refuses,
    or is out of reach.
    """
    try:
        name = create_repo(repository, private=True, exist_ok=True).repo_id
        with TemporaryDirectory() as temporary:
            copy = shutil.copytree(adapter, Path(temporary) / "adapter", ignore=shutil.ignore_patterns(CARD))
            config = PeftConfig.from_pretrained(copy)
            name_base(copy, published(config.base_model_name_or_path), config.revision)
            write_checksums(copy)
            shutil.copy(adapter / CARD, copy)
            return str(upload_folder(repo_id=name, folder_path=copy, commit_message="LoRA adapter and model card"))
    except Exception as error:  # the library's exceptions differ from release to release
        what = f"The adapter was not pushed to {repository} ({first_line(error)}): it is whole on disk"
        remedy = "log in with `hf auth login` and check the name (owner/name) and the network"
        raise AlpacaError(f"{what}; {remedy}.") from error
