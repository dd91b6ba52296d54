"""The chat page: a client of an OpenAI-compatible address."""
