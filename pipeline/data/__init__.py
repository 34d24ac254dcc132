"""Data: from source text to token shards on disk, and from shards to the batches of one rank."""

SOURCES = {
    "embedded": "pipeline.data.embedded:EmbeddedSource",
    "jsonl": "pipeline.data.jsonl:JsonlSource",
    "parquet": "pipeline.data.parquet:ParquetSource",
    "text": "pipeline.data.plain_text:TextSource",
    "huggingface": "pipeline.data.huggingface:HuggingFaceSource",
    "synthetic": "pipeline.data.synthetic:SyntheticSource",
}
"""Every value of `data.source.kind` and the class that reads it."""
