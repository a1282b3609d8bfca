"""Several bundles in a chain, declared in JSON; the built-in chains are the JSON files here."""
