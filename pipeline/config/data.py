"""What text is, how it is cleaned, mixed and turned into tokens: every field of `DataConfig`."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import Section, Seed

SourceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,39}$")]
"""A source's name in a mixture; metric names and file names hold it."""

SourceKind = Literal["embedded", "jsonl", "parquet", "text", "huggingface", "synthetic"]

PATHLESS_KINDS = ("embedded", "synthetic")


class SyntheticConfig(Section):
    """Documents of random words, made from a seed: data of any size that needs no file."""

    num_documents: int = Field(default=10_000, ge=1)
    """Documents."""
    mean_words: int = Field(default=200, ge=1)
    """Mean words of a document; lengths are geometric, as many short ones as a real corpus has."""
    vocabulary_words: int = Field(default=10_000, ge=2)
    """Different words, drawn with Zipf's frequencies."""
    seed: Seed = 0
    """Seed of words and lengths."""


class SourceConfig(Section):
    """Where text comes from."""

    kind: SourceKind = "embedded"
    """The embedded corpus, JSON lines, Parquet, text, Hugging Face datasets, or made-up words."""
    path: str | tuple[str, ...] | None = None
    """Files, directories or globs for jsonl, parquet and text, local or by URL (`s3://`, `gs://`,
    `hf://`); hub name or local directory for huggingface."""
    text_column: str = "text"
    """The field that holds a document's text."""
    id_column: str | None = "id"
    """The field that holds a document's id; without it, or with null, the id is made from path and
    ordinal."""
    split: str = "train"
    """The split of a Hugging Face dataset."""
    subset: str | None = None
    """The configuration of a Hugging Face dataset, where it has several."""
    revision: str | None = None
    """Commit, tag or branch of a dataset on the hub; None takes its newest commit."""
    document: Literal["file", "line"] = "file"
    """Text files only: what one document is; a line that is blank is none."""
    document_bytes: int | None = Field(default=None, ge=1)
    """Text files only: cut at blank lines into documents of about this size; None cuts nothing."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """Made-up words: how many."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths, one or several."""
        return (self.path,) if isinstance(self.path, str) else (self.path or ())

    @model_validator(mode="after")
    def _path_is_given(self) -> Self:
        if self.kind not in PATHLESS_KINDS and not any(self.paths):
            raise ValueError(
                f"kind={self.kind} needs path: the file, directory, glob or dataset to read"
            )
        if self.kind in PATHLESS_KINDS and self.path is not None:
            raise ValueError(
                f"kind={self.kind} takes no path, got {self.path!r}; use kind=jsonl or kind=text"
            )
        if self.kind == "huggingface" and len(self.paths) > 1:
            raise ValueError("kind=huggingface takes one path; name further ones in data.sources")
        if self.id_column == self.text_column:
            raise ValueError(
                f"text_column and id_column are both {self.text_column!r}; name another id_column, "
                "or null to make ids"
            )
        if self.document == "line" and self.document_bytes is not None:
            raise ValueError(
                "document=line and document_bytes contradict each other; leave one out"
            )
        return self


class MixtureConfig(Section):
    """How often the samples of each source are seen; it changes no token, so nothing is redone."""

    weights: dict[SourceName, Annotated[float, Field(ge=0.0)]] | None = None
    """Share of each source in the samples, in any unit; a source of weight 0 is left out
    of training. Validation scores the held-out documents of all sources, whatever the weights."""
    epochs: dict[SourceName, Annotated[float, Field(ge=0.0)]] | None = None
    """Instead of weights: passes over each source, relative to each other, so that the share is
    epochs times size; a source that is not named has 1."""
    max_epochs: dict[SourceName, Annotated[float, Field(gt=0.0)]] | None = None
    """Most passes over a source in a run; a run that would take more is refused before it starts.
    Up to 4 are worth nearly as much as new text (Muennighoff et al. 2023, section 5)."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.weights is not None and self.epochs is not None:
            raise ValueError("weights and epochs are two ways to say the same; leave one out")
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("weights are all 0; give one source a positive weight")
        if self.epochs and not any(self.epochs.values()) and len(self.epochs) > 1:
            raise ValueError("epochs are all 0; give one source a positive number")
        return self


class MinHashConfig(Section):
    """Near-duplicates by MinHash bands.

    Two documents are candidates if all hashes of one band agree, which happens with probability
    1 - (1 - s^rows)^bands at Jaccard similarity s: 0.92 at 0.8, one half at 0.72.

    Source: Penedo et al. 2024 (FineWeb), section 3.4: 14 bands of 8 over 5-word shingles.
    """

    num_bands: int = Field(default=14, ge=1)
    """Bands."""
    band_hashes: int = Field(default=8, ge=1)
    """Hashes of a band."""
    shingle_words: int = Field(default=5, ge=1)
    """Words of a shingle; a document with fewer is compared as a whole only."""
    seed: Seed = 1
    """Seed of the hash functions."""


class CleanConfig(Section):
    """Which documents are left out; everything is off by default."""

    filters: tuple[str, ...] = ()
    """Names in `FILTERS` or of the sets gopher, c4, fineweb, applied in this order; needs the
    `clean` extra."""
    options: dict[str, dict[str, Any]] = {}
    """Arguments of a filter by its name, such as `gopher_quality: {max_doc_words: 500000}`."""
    deduplicate: Literal["none", "exact", "minhash"] = "none"
    """Leave out documents whose text stood earlier in the source: the same text, or (minhash, the
    `clean` extra) nearly the same."""
    minhash: MinHashConfig = MinHashConfig()
    """What nearly the same means."""
    keep_dropped: bool = False
    """Write every dropped document with its reason to `dropped/` beside the shards."""


class TokenizerConfig(Section):
    """Which tokenizer turns text into token ids."""

    path: str | None = None
    """A `tokenizer.json` to load; None trains a byte-level BPE on the source."""
    vocab_size: int = Field(default=2048, ge=257)
    """Entries to train, the end-of-document token included; ignored when `path` is given."""
    end_of_document: str = "<|endoftext|>"
    """The token that closes each document; a loaded tokenizer must hold it."""
    special_tokens_in_text: bool = False
    """Whether text such as `<|endoftext|>` in a document becomes the special token it names. Off,
    it is encoded as the text it is, so that no document can forge the end of another."""


class DataConfig(Section):
    """Source text, cleaning, tokenizer, split and mixture."""

    source: SourceConfig = SourceConfig()
    """Where text comes from."""
    sources: dict[SourceName, SourceConfig] = {}
    """In place of `source`: several sources by name, to be mixed."""
    mixture: MixtureConfig = MixtureConfig()
    """How several sources are mixed; by default each is passed over equally often."""
    clean: CleanConfig = CleanConfig()
    """Filters and deduplication."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    validation_fraction: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Share of documents held out, chosen by the hash of the document id."""
    max_document_bytes: int = Field(default=64 << 20, ge=1)
    """UTF-8 bytes of the longest document; a longer one is bad input. A worker holds one whole."""
    on_bad_input: Literal["fail", "quarantine"] = "fail"
    """What happens at input that cannot be read: nothing is prepared, or it is left out and listed
    with its reason in `quarantine/` beside the shards."""
    output_dir: Path | None = None
    """Where prepared shards stand; None takes `data/` in the run's output directory."""
    prepared_dir: Path | None = None
    """A prepared directory to use as it is; written into a resolved run: ranks never prepare."""
    prepared_url: str | None = None
    """The same directory in an object store, such as `s3://bucket/data/FINGERPRINT`: before its
    ranks start, every host copies it to `prepared_dir`, which may be a disk of its own, and checks
    each file's hash."""

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """All sources by name; a single one is called by its kind."""
        return dict(self.sources) or {self.source.kind: self.source}

    def source_field(self, name: str) -> str:
        """Give the field that holds a named source, for messages."""
        return f"data.sources.{name}" if self.sources else "data.source"

    @model_validator(mode="after")
    def _url_has_a_place(self) -> Self:
        if self.prepared_url is not None and self.prepared_dir is None:
            raise ValueError("prepared_url needs prepared_dir: where each host keeps its copy")
        return self

    @model_validator(mode="after")
    def _sources_agree(self) -> Self:
        if self.sources and self.source != SourceConfig():
            raise ValueError("source and sources contradict each other; leave one out")
        named = {
            f"mixture.{field}": values
            for field in ("weights", "epochs", "max_epochs")
            if (values := getattr(self.mixture, field)) is not None
        }
        known = self.named_sources
        for field, values in named.items():
            for name in values:
                if name not in known:
                    raise ValueError(f"{field} names {name!r}; the sources are {sorted(known)}")
        missing = [name for name in known if name not in (self.mixture.weights or known)]
        if missing:
            raise ValueError(f"mixture.weights lacks {missing}; 0 leaves a source out")
        return self
