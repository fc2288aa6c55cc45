"""The daemon's directory on disk: a folder per run with card, segments, watermark, dead letters."""
