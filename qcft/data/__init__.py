"""Data: many formats in, one conversational form out; split, digested, tokenised and mixed."""
