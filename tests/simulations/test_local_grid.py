import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from crafts_simulations.local_grid import LocalGrid, LocalNode, TurnsHere


def node(handler, **config) -> LocalNode:
    app = ClientApp()
    app.train()(handler)
    return LocalNode(app=app, node_config=config)


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def ask(grid: LocalGrid, node_id: int, text: str = "hello") -> str:
    content = RecordDict({"note": ConfigRecord({"text": text})})
    (message_id,) = grid.push_messages([Message(content, node_id, "train")])
    return message_id


def test_nodes_have_ids_in_the_order_of_their_names() -> None:
    names = []
    grid = LocalGrid(TurnsHere({"b": node(echo), "a": node(echo)}, on_turn=names.append))

    for node_id in grid.get_node_ids():
        list(grid.pull_messages([ask(grid, node_id)]))

    assert list(grid.get_node_ids()) == [1, 2]
    assert names == ["a", "b"]


def test_a_site_works_when_its_reply_is_asked_for_and_once() -> None:
    turns = []
    grid = LocalGrid(TurnsHere({"a": node(echo)}, on_turn=turns.append))
    message_id = ask(grid, 1)

    assert turns == []
    (reply,) = grid.pull_messages([message_id])
    assert reply.content["note"]["text"] == "hello"
    assert list(grid.pull_messages([message_id])) == []
    assert turns == ["a"]


def test_sites_share_no_object_with_the_coordinator_or_each_other() -> None:
    def scribble(message: Message, context: Context) -> Message:
        seen.append(str(message.content["note"]["text"]))
        message.content["note"]["text"] = "scribbled"
        return Message(message.content, reply_to=message)

    seen: list[str] = []
    grid = LocalGrid(TurnsHere({"a": node(scribble), "b": node(scribble)}))
    content = RecordDict({"note": ConfigRecord({"text": "clean"})})
    ids = list(grid.push_messages([Message(content, each, "train") for each in (1, 2)]))

    replies = list(grid.pull_messages(ids))

    assert seen == ["clean", "clean"]
    assert content["note"]["text"] == "clean"
    replies[0].content["note"]["text"] = "changed"
    assert replies[1].content["note"]["text"] == "scribbled"


def test_each_site_sees_its_own_configuration_and_state() -> None:
    def count(message: Message, context: Context) -> Message:
        record = context.state.setdefault("count", ConfigRecord({"n": 0}))
        record["n"] += 1
        text = f"{context.node_config['home']}: {record['n']}"
        return Message(RecordDict({"note": ConfigRecord({"text": text})}), reply_to=message)

    grid = LocalGrid(TurnsHere({"a": node(count, home="/a"), "b": node(count, home="/b")}))

    said = [
        str(next(iter(grid.pull_messages([ask(grid, each)]))).content["note"]["text"])
        for each in (1, 1, 2)
    ]

    assert said == ["/a: 1", "/a: 2", "/b: 1"]


def test_an_exception_becomes_an_error_without_its_text() -> None:
    def fail(message: Message, context: Context) -> Message:
        raise RuntimeError("patient Jane Doe")

    grid = LocalGrid(TurnsHere({"a": node(fail), "b": node(echo)}))

    (reply,) = grid.pull_messages([ask(grid, 1)])

    assert (reply.error.code, reply.error.reason) == (2, "RuntimeError")


def test_ctrl_c_at_a_site_stops_the_run() -> None:
    def interrupted(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    grid = LocalGrid(TurnsHere({"a": node(interrupted)}))

    with pytest.raises(KeyboardInterrupt):
        list(grid.pull_messages([ask(grid, 1)]))
