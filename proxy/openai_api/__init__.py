"""The OpenAI API as served: routes and their fields, strict request parsing, and text from answers."""
