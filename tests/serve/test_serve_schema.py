"""The server against its own OpenAPI description, with data that fits and data that does not: never a 5xx."""

from __future__ import annotations

import hypothesis
import schemathesis
import serve_models as models
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from multihead.serve.app import ServeSettings, create_app

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection, unsupported_method,
]
SETTINGS = ServeSettings(max_tokens=64, allowed_hosts=["testserver"])
LIMITS = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None,
                             suppress_health_check=list(hypothesis.HealthCheck))


def described(*names: str):
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(models.served(names, 128), SETTINGS))


writer, mood = described("writer"), described("mood").include(path="/v1/predict")
filler = described("filler").include(path="/v1/embeddings")
chain = described("finder", "taste").include(path_regex="^/v1/(recommend|items)$")
assert {"/v1/recommend", "/v1/items"} <= set(chain)
assert {"/v1/predict", "/v1/completions", "/v1/chat/completions", "/v1/models"} <= set(writer)


@writer.parametrize()
@LIMITS
def test_no_answer_of_a_writer_breaks_the_description(case):
    case.validate_response(case.call(), checks=CHECKS)


@mood.parametrize()
@LIMITS
def test_no_answer_of_a_labeller_breaks_the_description(case):
    case.validate_response(case.call(), checks=CHECKS)


@filler.parametrize()
@LIMITS
def test_no_vector_breaks_the_description(case):
    case.validate_response(case.call(), checks=CHECKS)


@chain.parametrize()
@LIMITS
def test_no_list_breaks_the_description(case):
    case.validate_response(case.call(), checks=CHECKS)
