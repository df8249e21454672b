"""Features on disk: a folder of shards and its manifest. Knows no extraction."""
