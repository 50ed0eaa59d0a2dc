"""A docstring says what a method logs, in what range, when to use it and what it cannot do."""

import inspect
import random

import pytest
from samples import YAML, random_layout, random_tokens, scored, settings_of, several

from prefopt.config.docstring import LABELS, doc_parts
from prefopt.objectives.mixture import Mixture


@pytest.mark.parametrize("slug", YAML)
def test_docstring_has_every_label_and_an_equation(slug):
    equations, _, said = doc_parts(inspect.getdoc(settings_of(slug)[0]))
    assert equations and set(said) == set(LABELS) and all(said.values())


# What a mixture logs is what its parts log.
@pytest.mark.parametrize("slug", [slug for slug in YAML if settings_of(slug)[0] is not Mixture])
def test_docstring_names_what_is_logged(slug):
    rng, logged = random.Random(slug), set()
    for objective in several(slug, draws=1):
        layout = random_layout(objective, rng, 4)
        logged |= objective(scored(objective, layout, random_tokens(objective, layout, rng))).metrics.keys()
    assert {name for name in logged if name.partition("/")[0] not in inspect.getdoc(settings_of(slug)[0])} == set()
