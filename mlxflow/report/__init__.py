"""One run on one self-contained page: reads what the stages reported, draws it, writes HTML that asks for nothing."""
