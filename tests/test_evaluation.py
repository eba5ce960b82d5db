"""Predictions that can be interrupted."""

from tkpo.evaluation import predict


def test_an_interrupted_evaluation_takes_nothing_from_another_adapter(tmp_path):
    class Writer:
        model_name = "tiny"

        def __init__(self, text):
            self.text = text

        def generate(self, records, adapter, **options):
            return [self.text] * len(records)

    record = {"id": "a", "attribute": "literary", "form": "topic", "input": "Topic: Salt"}
    part = tmp_path / "scores.json.part.jsonl"
    options = {"part": part, "progress": False}
    assert predict(Writer("first"), [record], "adapter", adapter_source="runs/one", **options) == ["first"]
    assert predict(Writer("again"), [record], "adapter", adapter_source="runs/one", **options) == ["first"]
    assert predict(Writer("other"), [record], "adapter", adapter_source="runs/two", **options) == ["other"]
