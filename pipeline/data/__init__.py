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

FILTERS = {
    "gopher_repetition": "datatrove.pipeline.filters:GopherRepetitionFilter",
    "gopher_quality": "datatrove.pipeline.filters:GopherQualityFilter",
    "c4_quality": "datatrove.pipeline.filters:C4QualityFilter",
    "c4_bad_words": "datatrove.pipeline.filters:C4BadWordsFilter",
    "fineweb_quality": "datatrove.pipeline.filters:FineWebQualityFilter",
    "language": "datatrove.pipeline.filters:LanguageFilter",
    "regex": "datatrove.pipeline.filters:RegexFilter",
}
"""Every filter that `data.clean.filters` may name; built with datatrove's defaults and options.

The defaults of datatrove are the published numbers. Source: Rae et al. 2021 (Gopher), appendix A
and table A1; Raffel et al. 2020 (C4), section 2.2; Penedo et al. 2024 (FineWeb), section 3.6.
"""

FILTER_SETS: dict[str, dict[str, dict[str, object]]] = {
    "gopher": {"gopher_repetition": {}, "gopher_quality": {}},
    "c4": {"c4_quality": {}},
    "fineweb": {
        "gopher_repetition": {},
        "gopher_quality": {},
        "c4_quality": {"filter_no_terminal_punct": False},
        "fineweb_quality": {},
    },
}
"""Names for several filters in their published order, with what differs from their defaults.

FineWeb leaves C4's rule of terminal punctuation out: it alone drops 30% of the tokens (Penedo et
al. 2024, section 3.5). Its language filter comes before these and needs a model file, and C4's list
of bad words is a file too; both are named by themselves: `filters: [language, fineweb]`.
"""
