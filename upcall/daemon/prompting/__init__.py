"""Prompts a person for PINs and passphrases, and keeps PINs for a limited time. Imported with the first prompt, except
for `settings`.

    KeyHandler -- Prompts -- a thread per open prompt -- agent.py     a terminal that runs `upcall prompt`
                  prompts.py                          -- pinentry.py  a dialog on the desktop
                  pins.py                             -- systemd.py   the password agents of systemd
                  passphrases.py

A prompt outlives the request that caused it: eCryptfs waits for 2.5 s, a person needs ten. So each prompt has a thread
of its own. Only one prompt is shown at a time. Requests wait for its end, or are refused with "prompting" and find the
PIN when they are repeated. The daemon's main thread only passes on connections.

A token counts wrong PINs and locks itself after a few, often three. Therefore an untried PIN is given to one request
at a time, and the others wait for the verdict. A trial that ends without a verdict counts as wrong. After two wrong
PINs no prompt opens until a person runs `upcall key unlock`. The count does not expire, because the token's does not.

Wrong passphrases have no such cost. So the prompt's thread tries a passphrase at once, and repeats the prompt if it is
wrong. The key service keeps a passphrase that opens its key.
"""
