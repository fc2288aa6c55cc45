"""Brings runs of a source to a server, by the same rooms as the daemon's lanes.

source      what an importer makes of a run, and the feed that stands in for a spool's folder
one_run     one run, from finding it to telling its end
translation ids in tags and params of other stores' runs
late_links  what runs wait for, and what is told once it has come
engine      many runs side by side
"""
