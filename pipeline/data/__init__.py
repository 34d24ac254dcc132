"""Data: from source text to token shards on disk, and from shards to the batches of one rank."""

SOURCES = {
    "embedded": "pipeline.data.sources:EmbeddedSource",
    "jsonl": "pipeline.data.sources:JsonlSource",
    "text": "pipeline.data.sources:TextSource",
    "huggingface": "pipeline.data.sources:HuggingFaceSource",
}
"""Every value of `data.source.kind` and the class that reads it."""
