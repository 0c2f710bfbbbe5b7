"""A resident editor behind HTTP: `sdedit serve`. Needs the extra `serve`; nothing of it is loaded before it is used."""
