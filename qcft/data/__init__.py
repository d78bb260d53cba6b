"""Reads many data formats into one conversational form; splits, digests, tokenises and mixes the rows."""
