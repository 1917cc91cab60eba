"""The HTTP side of Seraph: the OpenAI API over any `engine.Engine`."""
