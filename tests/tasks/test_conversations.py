"""Questions to a run are put as the conversations were that it was trained on."""

import pytest

from loralloc.tasks.conversations import Chat, Common, read_messages
from loralloc.tasks.task import RowError


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("system", (None, "Be brief."))
def test_a_question_comes_after_the_system_message_and_the_turns_before(system):
    chat = Common(system=system, template_options={"a": 1}).ask_turns(("A?", "B?", "C?"), ("a",))
    first = [] if system is None else [message("system", system)]
    turns = [message("user", "A?"), message("assistant", "a"), message("user", "B?")]
    assert chat == Chat(messages=[*first, *turns], template_options={"a": 1})


def test_what_is_common_comes_back_from_its_data():
    shared = Common(system="Be brief.", template_options={"tools": [{"name": "f"}]})
    assert Common(**shared.as_data()) == shared


def test_further_keys_of_messages_stay():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert read_messages([call], "messages") == [call]
    assert read_messages([{"from": "gpt", "value": "a", "weight": 0}], "messages") == [
        {"role": "assistant", "content": "a", "weight": 0}
    ]


@pytest.mark.parametrize("messages", [[{"from": "human"}], [{"role": 3, "content": "a"}], ["a"]])
def test_what_is_no_message_is_refused_by_its_column(messages):
    with pytest.raises(RowError, match="field 'conversations' "):
        read_messages(messages, "conversations")
