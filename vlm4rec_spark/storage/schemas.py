"""The contract between stages: each table's columns, key, constraints and comments.

Knows names and types only. `layout.py` turns a record into a Delta table, and the stages select
these columns.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

from pyspark.sql.types import StructType

LAYOUT = 1
"""Version of all tables, stored in each table's properties. Another layout is refused."""
DEFAULT_LIST = "default"
"""The only list of a user, until there are several."""

_RARE_CHECKPOINTS = (("delta.checkpointInterval", "100"),)
"""For tables of few small files: a checkpoint takes longer than what reading it spares."""


@dataclass(frozen=True)
class Table:
    """A table's name, columns (Spark DDL with comments), key columns and CHECK constraints.

    - `volatile`: columns that say when or by which run a row was made. Two rows that differ only
      there are the same row.
    - `feed`: turns the change data feed on, where a later stage or a consumer reads changes.
    - `cluster`: the columns by which files are clustered, because readers filter on them.
    - `heavy`: a row may be megabytes large, which files are written for.
    - `personal`: columns that identify a person. Files carry no statistics of them, so that an
      erased id doesn't live on in the Delta log.
    - `properties`: Delta's own properties, beyond those that the other fields ask for.
    """

    name: str
    comment: str
    ddl: str
    key: tuple[str, ...]
    checks: tuple[tuple[str, str], ...] = ()
    volatile: tuple[str, ...] = ()
    feed: bool = False
    cluster: tuple[str, ...] = ()
    heavy: bool = False
    personal: tuple[str, ...] = ()
    properties: tuple[tuple[str, str], ...] = ()

    @cached_property
    def schema(self) -> StructType:
        return cast(StructType, StructType.fromDDL(self.ddl))

    @property
    def columns(self) -> list[str]:
        return self.schema.fieldNames()


ITEMS = Table(
    "items",
    "The catalogue: one row per item, as last delivered.",
    """item_id STRING NOT NULL COMMENT 'Id of the item, as in the catalogue',
    title STRING COMMENT 'Title, as delivered',
    brand STRING COMMENT 'Brand, as delivered',
    category STRING COMMENT 'Category, as delivered',
    parent_id STRING COMMENT 'Variants of one product share it',
    region STRING COMMENT 'Region in which the item is sold; null: all',
    price DOUBLE COMMENT 'Price in the currency',
    currency STRING COMMENT 'Currency of the price; null: that of the catalogue',
    url STRING COMMENT 'Page of the item in the shop',
    attributes MAP<STRING, STRING> COMMENT 'Further catalogue columns that the config names',
    available BOOLEAN NOT NULL COMMENT 'False: never recommended',
    first_seen_at TIMESTAMP COMMENT 'When the item entered the catalogue; null: always there',
    updated_at TIMESTAMP NOT NULL COMMENT 'When this row last changed'""",
    key=("item_id",),
    checks=(
        ("item_id_not_empty", "length(item_id) > 0"),
        ("price_is_a_price", "price IS NULL OR price >= 0"),
    ),
    volatile=("updated_at",),
    feed=True,
)

PHOTOS = Table(
    "photos",
    "One row per photo of an item. The bytes are here, so a price change never rewrites them.",
    """item_id STRING NOT NULL COMMENT 'Item that the photo shows',
    position INT NOT NULL COMMENT '0 is the main photo',
    uri STRING COMMENT 'Where the photo was read; null: it came as bytes in the catalogue',
    image BINARY COMMENT 'The bytes as delivered',
    image_sha256 STRING NOT NULL COMMENT 'SHA-256 of the bytes, in hexadecimal',
    bytes BIGINT NOT NULL COMMENT 'Size of the photo in bytes',
    modified_at TIMESTAMP COMMENT 'Modification time of the file',
    version STRING COMMENT 'The version or ETag that the store gives; null: it gives none'""",
    key=("item_id", "position"),
    checks=(
        ("position_from_zero", "position >= 0"),
        ("sha256_is_hex", "length(image_sha256) = 64"),
    ),
    feed=True,
    # A chunk of captioning reads the photos from one item to another.
    cluster=("item_id",),
    # Without deletion vectors, a MERGE rewrites every file that holds a changed photo. Measured:
    # three changes in 1,500 photos wrote 303 MB instead of 1.2 MB. With them, readers such as
    # deltalake 1.6 can't open the table.
    heavy=True,
)

INTERACTIONS = Table(
    "interactions",
    "The log: one row per event of a user with an item.",
    """event_id STRING NOT NULL COMMENT 'As delivered, or SHA-256 of user, item, type and time',
    user_id STRING NOT NULL COMMENT 'User who acted',
    item_id STRING NOT NULL COMMENT 'Item that was acted on',
    event_type STRING NOT NULL COMMENT 'Such as view, cart, purchase',
    event_time TIMESTAMP NOT NULL COMMENT 'When it happened, UTC',
    event_date DATE NOT NULL COMMENT 'Date of event_time; files are clustered by it'""",
    key=("event_id",),
    checks=(
        ("ids_not_empty", "length(user_id) > 0 AND length(item_id) > 0 AND length(event_id) > 0"),
    ),
    feed=True,
    cluster=("event_date",),
    personal=("event_id", "user_id"),
)

USERS = Table(
    "users",
    "What the company knows of its users; optional.",
    """user_id STRING NOT NULL COMMENT 'User',
    segment STRING COMMENT 'Group of the user; the evaluation shows each group separately',
    region STRING COMMENT 'Market of the user',
    consent BOOLEAN COMMENT 'Whether the user agreed to recommendations; null: not known',
    gone_at TIMESTAMP COMMENT 'When the user left; null: still there'""",
    key=("user_id",),
    personal=("user_id",),
)

IDENTITIES = Table(
    "identities",
    "Users known under another id before they signed in; optional.",
    """anonymous_id STRING NOT NULL COMMENT 'Earlier user_id in the log, such as a cookie',
    user_id STRING NOT NULL COMMENT 'User who it turned out to be',
    since TIMESTAMP COMMENT 'From when on the id is the user; null: always'""",
    key=("anonymous_id",),
    feed=True,
    personal=("anonymous_id", "user_id"),
)

CAPTIONS = Table(
    "captions",
    "One row per distinct content: the key covers the photo, the prompt, the model and settings.",
    """caption_key STRING NOT NULL COMMENT 'SHA-256 of photo, rendered prompt, model, parameters',
    image_sha256 STRING COMMENT 'Photo that was described; null for an imported caption',
    prompt_id STRING COMMENT 'Name and version of the prompt',
    model STRING COMMENT 'Model at revision',
    caption STRING COMMENT 'The description; null unless status is ok or imported',
    attributes MAP<STRING, STRING> COMMENT 'What a structured prompt said about the item',
    input_tokens INT COMMENT 'Tokens of prompt and photo',
    output_tokens INT COMMENT 'Tokens of the description',
    status STRING NOT NULL COMMENT 'ok, failed, rejected or imported',
    error_class STRING COMMENT 'Class of the failure',
    error STRING COMMENT 'What went wrong',
    attempts INT NOT NULL COMMENT 'Runs in which it was tried',
    captioned_at TIMESTAMP NOT NULL COMMENT 'When the row was made',
    run_id STRING NOT NULL COMMENT 'Run that made the row'""",
    key=("caption_key",),
    checks=(
        ("status_is_known", "status IN ('ok', 'failed', 'rejected', 'imported')"),
        ("caption_or_error", "(caption IS NOT NULL) = (status IN ('ok', 'imported'))"),
        ("failure_is_named", "status IN ('ok', 'imported') OR error_class IS NOT NULL"),
    ),
    volatile=("attempts", "captioned_at", "run_id"),
    feed=True,
)

ITEM_CAPTIONS = Table(
    "item_captions",
    "Which caption an item has now.",
    """item_id STRING NOT NULL COMMENT 'Item',
    position INT NOT NULL COMMENT 'Photo of the item',
    caption_key STRING NOT NULL COMMENT 'Caption in force'""",
    key=("item_id", "position"),
    feed=True,
)

EMBEDDINGS = Table(
    "embeddings",
    "Unit vectors of the items, one per representation and encoder.",
    """item_id STRING NOT NULL COMMENT 'Item',
    representation STRING NOT NULL COMMENT 'What was encoded: title, caption, title_caption, image',
    encoder_id STRING NOT NULL COMMENT 'Encoder at revision',
    content_sha256 STRING NOT NULL COMMENT 'SHA-256 of the encoded text, or of the photo',
    fallback BOOLEAN NOT NULL COMMENT 'True: there is no caption and the title was encoded',
    embedding ARRAY<FLOAT> NOT NULL COMMENT 'Unit vector'""",
    key=("item_id", "representation", "encoder_id"),
    checks=(("unit_length", "abs(vector_norm(embedding) - 1) < 1e-3"),),
    feed=True,
)

PROFILES = Table(
    "profiles",
    "Each user's taste: the weighted history, every item they have seen, and their mean vector.",
    """user_id STRING NOT NULL COMMENT 'User',
    representation STRING NOT NULL COMMENT 'Representation of the vectors that were summed',
    history ARRAY<STRUCT<item_id: STRING, weight: DOUBLE>> NOT NULL
        COMMENT 'Items that count, most recent first',
    seen ARRAY<STRING> NOT NULL COMMENT 'Every item of the user, sorted',
    embedding ARRAY<FLOAT>
        COMMENT 'Unit vector: weighted mean of the history; null when no item has a vector',
    events BIGINT NOT NULL COMMENT 'Events that count',
    last_event_at TIMESTAMP NOT NULL COMMENT 'Last event that counts; decay is anchored here'""",
    key=("user_id",),
    checks=(("unit_length", "embedding IS NULL OR abs(vector_norm(embedding) - 1) < 1e-3"),),
    feed=True,
    personal=("user_id",),
)

RECOMMENDATIONS = Table(
    "recommendations",
    "The best k items of every user, best first.",
    """user_id STRING NOT NULL COMMENT 'User',
    list STRING NOT NULL COMMENT 'List of the user, such as that of a placement',
    items ARRAY<STRUCT<item_id: STRING, score: DOUBLE, because_item_id: STRING,
        because_terms: ARRAY<STRING>, source: STRING, collapsed: ARRAY<STRING>>> NOT NULL
        COMMENT 'In rank order; because: the nearest history item',
    k INT NOT NULL COMMENT 'Length that was requested',
    index_id STRING NOT NULL COMMENT 'Index that was searched',
    run_id STRING NOT NULL COMMENT 'Run that made the row',
    generated_at TIMESTAMP NOT NULL COMMENT 'When the row was made'""",
    key=("user_id", "list"),
    checks=(("at_most_k", "size(items) <= k"),),
    volatile=("index_id", "run_id", "generated_at"),
    personal=("user_id",),
)

EXPORT_LONG = Table(
    "export_long",
    "Recommendations for consumers: one row per user, list and rank. The change feed has changes.",
    """user_id STRING NOT NULL COMMENT 'User',
    list STRING NOT NULL COMMENT 'List of the user',
    rank INT NOT NULL COMMENT '1 is the best',
    item_id STRING NOT NULL COMMENT 'Recommended item',
    title STRING COMMENT 'Title of the item',
    score DOUBLE COMMENT 'Cosine of profile and item',
    because_item_id STRING COMMENT 'Item of the history that is nearest to it'""",
    key=("user_id", "list", "rank"),
    checks=(("rank_from_one", "rank >= 1"),),
    feed=True,
    personal=("user_id",),
)

EXPORT_WIDE = Table(
    "export_wide",
    "Recommendations for consumers: one row per user and list. The change feed has changes.",
    """user_id STRING NOT NULL COMMENT 'User',
    list STRING NOT NULL COMMENT 'List of the user',
    item_ids ARRAY<STRING> NOT NULL COMMENT 'Recommended items, best first',
    scores ARRAY<DOUBLE> NOT NULL COMMENT 'Their scores'""",
    key=("user_id", "list"),
    checks=(("same_length", "size(item_ids) = size(scores)"),),
    feed=True,
    personal=("user_id",),
)

REJECTED = Table(
    "rejected",
    "Rows of the sources that were not taken, with the reason.",
    """source STRING NOT NULL COMMENT 'items, photos or interactions, and the file',
    row STRING NOT NULL COMMENT 'The raw row as JSON',
    reason STRING NOT NULL COMMENT 'Why it was not taken',
    occurrences BIGINT NOT NULL COMMENT 'How often the source holds this very row'""",
    key=("source", "row"),
    # The raw row may begin with a user's id.
    personal=("row",),
)

INGESTED_FILES = Table(
    "ingested_files",
    "The source files that were read to their end.",
    """source STRING NOT NULL COMMENT 'items or interactions',
    file STRING NOT NULL COMMENT 'URI of the file, or a table and its version',
    size BIGINT NOT NULL COMMENT 'Bytes of the file',
    modified_at TIMESTAMP NOT NULL COMMENT 'Modification time of the file',
    settings_sha256 STRING NOT NULL COMMENT 'How it was read; other settings read it again',
    rows_read BIGINT COMMENT 'Rows of the file; null: not counted, as before release 0.2',
    rows_taken BIGINT COMMENT 'Rows that became rows of the table; null as rows_read',
    rows_rejected BIGINT COMMENT 'Rows that went to rejected; null as rows_read',
    rows_repeated BIGINT COMMENT 'Rows that were there already; null as rows_read',
    run_id STRING NOT NULL COMMENT 'Run that read it'""",
    key=("source", "file", "size", "modified_at", "settings_sha256"),
    # After a kill, the rows that the killed run wrote count as repeated.
    volatile=("rows_taken", "rows_repeated", "run_id"),
)

STATE = Table(
    "state",
    "What each stage did last, as later runs read it back: one row per stage.",
    """stage STRING NOT NULL COMMENT 'Stage',
    layout INT NOT NULL COMMENT 'Layout of the tables',
    fingerprint STRING COMMENT 'SHA-256 of all inputs and of the result; null: not finished yet',
    versions MAP<STRING, BIGINT> NOT NULL COMMENT 'Versions of the tables used, as found',
    representation STRING COMMENT 'Of index and profiles: what the vectors stand for',
    index_id STRING COMMENT 'Of index: the index in use; of recommend: the index searched',
    calibration STRUCT<target_recall: DOUBLE, leaves: INT, candidates: INT, recall: DOUBLE,
        low: DOUBLE, users: BIGINT, exact_lists_per_second: DOUBLE,
        tried: ARRAY<STRUCT<leaves: INT, candidates: INT, recall: DOUBLE, low: DOUBLE,
            lists_per_second: DOUBLE>>>
        COMMENT 'Of recommend: the search and its measured recall@k; no leaves: exact search',
    profiles STRUCT<settings_sha256: STRING, embeddings_version: BIGINT, profiles_version: BIGINT>
        COMMENT 'Of profiles: what an incremental run compares',
    evaluation STRUCT<
        splits: MAP<STRING, STRUCT<cut: STRING, users: BIGINT, candidates: BIGINT,
            left_out_share: DOUBLE, identical_vectors: MAP<STRING, BIGINT>,
            above_chance: ARRAY<STRING>, tuned: MAP<STRING, MAP<STRING, DOUBLE>>>>,
        caption_audit: STRUCT<trouble: STRING,
            captioners: ARRAY<STRUCT<model: STRING, captions: BIGINT, sampled: BIGINT,
                earlier: ARRAY<STRING>, recaptioned: BIGINT, failures: MAP<STRING, BIGINT>,
                blank_caption: STRING, blank_error: STRING, cost: DOUBLE>>,
            examples: ARRAY<STRUCT<model: STRING, item_id: STRING, position: INT, caption: STRING,
                second_caption: STRING, rank: DOUBLE, attribute: STRING, value: STRING>>>>
        COMMENT 'Of evaluate: facts about each split, and the caption audit for the report',
    run_id STRING NOT NULL COMMENT 'Run that wrote the row',
    updated_at TIMESTAMP NOT NULL COMMENT 'When the row was written'""",
    key=("stage",),
    volatile=("run_id", "updated_at"),
    properties=_RARE_CHECKPOINTS,
)

RUNS = Table(
    "runs",
    "What every run of every stage did.",
    """run_id STRING NOT NULL COMMENT 'Run',
    stage STRING NOT NULL COMMENT 'Stage',
    status STRING NOT NULL COMMENT 'ok, failed, or unchanged: nothing new since the last good run',
    rows_in BIGINT NOT NULL COMMENT 'rows_ok + rows_failed + rows_skipped',
    rows_ok BIGINT NOT NULL COMMENT 'Rows that were made',
    rows_failed BIGINT NOT NULL COMMENT 'Rows that became an error',
    rows_skipped BIGINT NOT NULL COMMENT 'Rows that needed no work, or were left out on purpose',
    versions MAP<STRING, BIGINT> NOT NULL COMMENT 'Versions of the tables used, as found',
    config STRING NOT NULL COMMENT 'Effective config as JSON',
    started_at TIMESTAMP NOT NULL COMMENT 'Start',
    seconds DOUBLE NOT NULL COMMENT 'Duration',
    device_seconds DOUBLE COMMENT 'Time that the model worked, summed over devices',
    details MAP<STRING, STRING> NOT NULL COMMENT 'Figures of the stage, such as measured recall'""",
    key=("run_id", "stage"),
    checks=(
        ("counts_add_up", "rows_in = rows_ok + rows_failed + rows_skipped"),
        ("status_is_known", "status IN ('ok', 'failed', 'unchanged')"),
    ),
    # Every stage of every run adds one file of one row. From 50 small files on, the writer joins
    # them. Measured: reading 1,000 of them takes six times as long as 50.
    properties=(("delta.autoOptimize.autoCompact", "true"), *_RARE_CHECKPOINTS),
)

METRICS = Table(
    "metrics",
    "Offline evaluation: one row per split, arm, control, metric, k and slice.",
    """run_id STRING NOT NULL COMMENT 'Run',
    split STRING NOT NULL COMMENT 'time, leave_one_out; captions: the caption audit',
    arm STRING NOT NULL COMMENT 'What was evaluated; of captions their model, or imported',
    control STRING NOT NULL COMMENT 'Arm that this one is compared with; empty: none',
    metric STRING NOT NULL COMMENT 'Such as recall, coverage, self_rank_10',
    k INT NOT NULL COMMENT 'Length of the evaluated list; 0 where there is none',
    slice STRING NOT NULL COMMENT 'all, or a group of users, or of the items that they chose',
    value DOUBLE COMMENT 'Mean over users, of captions over items; null: too few for a number',
    low DOUBLE COMMENT 'Lower end of the 95 % bootstrap interval',
    high DOUBLE COMMENT 'Upper end of the 95 % bootstrap interval',
    users BIGINT NOT NULL COMMENT 'Users in the slice; of captions items',
    difference DOUBLE COMMENT 'The value minus that of the control',
    difference_low DOUBLE COMMENT 'Lower end of its 95 % bootstrap interval',
    difference_high DOUBLE COMMENT 'Upper end of its 95 % bootstrap interval',
    p_value DOUBLE COMMENT 'Of the paired comparison, corrected for the number of arms (Holm)'""",
    key=("run_id", "split", "arm", "control", "metric", "k", "slice"),
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        ITEMS,
        PHOTOS,
        INTERACTIONS,
        USERS,
        IDENTITIES,
        CAPTIONS,
        ITEM_CAPTIONS,
        EMBEDDINGS,
        PROFILES,
        RECOMMENDATIONS,
        EXPORT_LONG,
        EXPORT_WIDE,
        REJECTED,
        INGESTED_FILES,
        STATE,
        RUNS,
        METRICS,
    )
}
