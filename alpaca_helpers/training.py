"""Fine-tuning: collator, loss, arguments, checkpoints."""

from pathlib import Path

from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from .profiles import Profile


def training_arguments(settings: Profile, folder: Path) -> TrainingArguments:
    """Return the document's training arguments, with the profile's numbers; checkpoints go to `folder`/checkpoints."""
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=10,
        report_to=[],
        seed=settings.seed,
    )


def data_collator(tokenizer, recipe: str):
    """Return what makes a batch of rows: the document's collator, or one that pads to the longest row only."""
    if recipe == "document":
        return DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
    return DataCollatorForSeq2Seq(tokenizer, padding=True)


def make_trainer(model, tokenizer, data, settings: Profile, recipe: str, folder: Path) -> Trainer:
    """Return the trainer of `model` on `data` (`train` and `heldout`, tokenized)."""
    return Trainer(
        model=model,
        args=training_arguments(settings, folder),
        train_dataset=data["train"],
        eval_dataset=data["heldout"],
        data_collator=data_collator(tokenizer, recipe),
    )
