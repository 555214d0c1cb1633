"""OpenAI's API for the models that are served here."""
