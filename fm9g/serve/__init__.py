"""An address for a model: the OpenAI API and a chat page."""
