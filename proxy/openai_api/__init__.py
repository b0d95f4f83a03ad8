"""The OpenAI API as it is served: routes, the fields of each, strict bodies, and the texts of answers."""
