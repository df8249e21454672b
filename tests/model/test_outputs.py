"""What the models return behaves as transformers' outputs do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch.utils import _pytree as pytree

from dinov2_fast.huggingface import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from dinov2_fast.huggingface.outputs import ModelOutput

CLASSES = [BaseModelOutputWithPooling, ImageClassifierOutput, BackboneOutput]
TOKENS, POOLED = torch.arange(6.0).view(1, 3, 2), torch.ones(1, 2)
STATES = (TOKENS, TOKENS + 1)


@pytest.fixture(params=["ours", "transformers"])
def output(request: pytest.FixtureRequest) -> Any:
    """Made by each package, so that the tests below state what both do."""
    package = {"ours": BaseModelOutputWithPooling, "transformers": transformers.modeling_outputs}[request.param]
    make = package if isinstance(package, type) else package.BaseModelOutputWithPooling
    return make(last_hidden_state=TOKENS, pooler_output=POOLED, hidden_states=None, attentions=STATES)


def test_fields_are_those_of_transformers() -> None:
    for ours in CLASSES:
        theirs = getattr(transformers.modeling_outputs, ours.__name__)
        assert list(ours.__annotations__) == list(theirs.__dataclass_fields__)


def test_a_field_is_read_by_attribute_key_and_index(output: Any) -> None:
    assert output.last_hidden_state is output["last_hidden_state"] is output[0] is TOKENS
    assert output.pooler_output is output["pooler_output"] is output[1] is POOLED
    assert output.attentions is output["attentions"] is output[2] is output[-1] is STATES  # None is no item
    assert output[:2] == (TOKENS, POOLED)
    with pytest.raises(IndexError):
        output[3]


def test_missing_fields_are_none_as_attributes_and_absent_as_items(output: Any) -> None:
    assert output.hidden_states is None
    assert "hidden_states" not in output
    assert output.get("hidden_states") is None
    with pytest.raises(KeyError):
        output["hidden_states"]


def test_unknown_fields_are_refused(output: Any) -> None:
    assert not hasattr(output, "logits")
    with pytest.raises(AttributeError):
        _ = output.logits
    with pytest.raises(KeyError):
        output["logits"]
    with pytest.raises(TypeError, match="logits"):
        type(output)(logits=TOKENS)


def test_an_output_iterates_over_its_keys(output: Any) -> None:
    assert list(output) == list(output.keys()) == ["last_hidden_state", "pooler_output", "attentions"]
    assert len(output) == 3
    assert isinstance(output, dict)
    assert dict(**output) == dict(output.items())
    assert list(output.values()) == list(output.to_tuple())


def test_to_tuple_has_the_fields_that_are_not_none(output: Any) -> None:
    assert output.to_tuple() == (TOKENS, POOLED, STATES)
    assert type(output.to_tuple()) is tuple


def test_order_is_the_fields_not_the_arguments() -> None:
    output = ImageClassifierOutput(logits=POOLED, loss=TOKENS.sum())
    assert list(output) == ["loss", "logits"]


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal_outputs(output: Any, clone: Any) -> None:
    twin = clone(output)
    assert type(twin) is type(output)
    assert list(twin) == list(output)
    assert torch.equal(twin.last_hidden_state, TOKENS)
    assert torch.equal(twin.attentions[1], STATES[1])
    assert twin.hidden_states is None


def test_an_output_is_a_pytree(output: Any) -> None:
    doubled = pytree.tree_map(lambda x: x * 2, output)
    assert type(doubled) is type(output)
    assert list(doubled) == list(output)
    assert torch.equal(doubled.attentions[1], STATES[1] * 2)
    leaves, spec = pytree.tree_flatten(output)
    assert len(leaves) == 4
    assert list(pytree.tree_unflatten(leaves, spec)) == list(output)


def test_an_output_is_rebuilt_from_pairs_or_a_dictionary(output: Any) -> None:
    for items in ({key: output[key] for key in output}, ((key, output[key]) for key in output)):
        twin = type(output)(items)
        assert list(twin) == list(output)
        assert twin.pooler_output is POOLED


def test_assigning_sets_attribute_and_item(output: Any) -> None:
    output.pooler_output = TOKENS
    assert output["pooler_output"] is output[1] is TOKENS
    output["pooler_output"] = POOLED
    assert output.pooler_output is POOLED
    output.hidden_states = STATES
    assert output["hidden_states"] is STATES


@pytest.mark.parametrize("cls", CLASSES)
def test_assigning_an_unknown_field_is_refused(cls: type[ModelOutput]) -> None:
    output = cls()
    with pytest.raises(AttributeError, match="no field 'nonsense'"):
        output.nonsense = TOKENS
    with pytest.raises(AttributeError, match="no field 'nonsense'"):
        output["nonsense"] = TOKENS
    output.attentions = STATES
    output.attentions = None
    assert output.attentions is None
    assert len(output) == 0
