"""Attach rank allocation to a plain `transformers.Trainer` that classifies text.

Run: python examples/attach.py MODEL TRAIN.csv DEV.csv OUTPUT
The files have the columns `text` and `label` (0 or 1).
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from loralloc import AllocationConfig, attach


def main(model_name: str, train_file: str, dev_file: str, output: str) -> None:
    """Train a classifier whose ranks move twice."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    data = load_dataset("csv", data_files={"train": train_file, "dev": dev_file})
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)
    model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=2)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(output, num_train_epochs=2, report_to="none", save_strategy="no"),
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    attach(trainer, AllocationConfig(num_rounds=2, recovery_epochs=0.5, scoring_examples=16))
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
