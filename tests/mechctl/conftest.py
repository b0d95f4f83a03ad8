"""Small models and dictionaries for these tests."""

from artifact_fixtures import artifacts, make_dictionary, manifest_for, model, saelens_weights

__all__ = ["artifacts", "make_dictionary", "manifest_for", "model", "saelens_weights"]
