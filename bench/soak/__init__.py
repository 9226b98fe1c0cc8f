"""Ten minutes with an hour's worth of everything: what must not grow, does not; what was asked, was answered once."""
