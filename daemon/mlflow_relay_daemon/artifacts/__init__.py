"""From the ledger of a run to the store that its artifact URI names: a lane apart from metrics'."""
