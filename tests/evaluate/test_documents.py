"""What is held out is what `moma prepare` holds out, after cleaning."""

from moma.data.cleaning.config import CleaningConfig
from moma.data.config import DataConfig
from moma.data.sources.text import TextConfig
from moma.evaluate.documents import raw_documents


def held_out_texts(folder, **clean):
    source = TextConfig(path=folder / "words.txt", clean=CleaningConfig(**clean))
    shape = {"micro_batch_size": 1, "sequence_length": 64, "image_share": 0.0}
    values = {"path": folder / "data", "sources": [source.model_dump()], "held_out": 0.5}
    data = DataConfig.model_validate(values | shape)
    return [document.segments[0] for _, document in raw_documents(data, None)]


def test_documents_that_cleaning_drops_are_not_evaluated(tmp_path):
    texts = [f"document {number % 20}" for number in range(60)]
    (tmp_path / "words.txt").write_text("\n\n".join(texts))
    everything = held_out_texts(tmp_path)
    assert len(everything) > len({*everything})
    cleaned = held_out_texts(tmp_path, duplicate_texts=True)
    assert cleaned and len(cleaned) == len({*cleaned})
