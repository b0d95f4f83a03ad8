"""A file of several suites as users write it: a name, metrics, and where the data is."""

from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from discovery.evaluation.suites.suite import SYSTEM_PROMPT, EvaluationSuite, Role, SuiteSource
from interpretops.policy.fields import Identifier, StrictModel

SuiteMetric = Literal[
    "attack_success_rate",
    "defense_efficacy",
    "refusal_rate",
    "coherent_share",
    "toxicity_rate",
    "collateral_damage",
    "answers_unchanged",
    "similarity",
    "over_refusal",
    "exact_match",
    "bleu",
    "delta_ce",
]
ROLE_OF_METRIC: dict[SuiteMetric, Role] = {
    "attack_success_rate": "harmful",
    "defense_efficacy": "harmful",
    "refusal_rate": "harmful",
    "coherent_share": "harmful",
    "toxicity_rate": "toxic",
    "collateral_damage": "benign",
    "answers_unchanged": "benign",
    "similarity": "benign",
    "over_refusal": "borderline",
    "exact_match": "task",
    "bleu": "task",
    "delta_ce": "text",
}
"""What a suite's prompts are, by what is measured on them."""


class ListedSuite(StrictModel):
    """One suite of the file: one data set, and what is measured on it."""

    name: Identifier
    """Its name."""
    metrics: Annotated[tuple[SuiteMetric, ...], Field(min_length=1), Strict(False)]
    """What is measured. All of one kind of prompts: `attack_success_rate` and `bleu` are of two."""
    dataset_uri: Annotated[str, Field(min_length=1, max_length=1024)]
    """File beside this one or in the data folder, or a URL that fsspec reads: `s3://`, `https://`, …"""
    role: Role | None = None
    """What its prompts are; else what the metrics say."""
    licence: Annotated[str, Field(min_length=1)] = "not stated"
    """Licence of the data."""
    field: str | None = None
    """Field or column of the prompt; else the first that is there of those we know."""
    answer: str | None = None
    """Field of the right answer, for `exact_match` and `bleu`; else the first of those we know."""
    template: Annotated[str, Field(pattern=r"\{\}")] | None = None
    """Text with {} in it, where the field is put to make the prompt."""
    ask: Literal["chat", "completion"] = "chat"
    """Ask in the model's chat format, or let it go on with the plain text."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Most prompts."""
    description: str = ""
    """What it is for."""
    system_prompt: Annotated[str, Field(min_length=1)] | None = SYSTEM_PROMPT
    """The baseline that every policy should beat; null leaves it out."""

    @model_validator(mode="after")
    def _one_kind_of_prompts(self) -> Self:
        if self.role is not None:
            return self
        first = self.metrics[0]
        for metric in self.metrics:
            if ROLE_OF_METRIC[metric] != ROLE_OF_METRIC[first]:
                raise ValueError(
                    f"metrics names {first!r}, of {ROLE_OF_METRIC[first]} prompts, and {metric!r}, of "
                    f"{ROLE_OF_METRIC[metric]} ones; make two suites of them"
                )
        return self

    def suite(self) -> EvaluationSuite:
        """The same with all that it leaves out."""
        source = SuiteSource(
            path=self.dataset_uri,
            role=self.role or ROLE_OF_METRIC[self.metrics[0]],
            licence=self.licence,
            field=self.field,
            answer=self.answer,
            template=self.template,
            ask=self.ask,
            limit=self.limit,
        )
        return EvaluationSuite(
            name=self.name,
            description=self.description,
            sources=(source,),
            system_prompt=self.system_prompt,
            metrics=self.metrics,
        )


class SuiteList(StrictModel):
    """A file of suites."""

    suites: Annotated[tuple[ListedSuite, ...], Field(min_length=1), Strict(False)]
    """Its suites."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [suite.name for suite in self.suites]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"suites has two called {twice[0]!r}; rename one")
        return self
