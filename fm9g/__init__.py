"""fm9g: pretrain and finetune the 9G language models, raw text in, Hugging Face folder out."""

__version__ = "0.1.0"
