"""A base model by name or folder, its tokenizer, chat template and adapter; a conversation becomes token ids here."""
