"""How was a prompt routed, and what did strategies change? Two traces compared, in a terminal, a page, a picture."""
