"""How a person is asked for a PIN or a passphrase, and what becomes of it. Imported when the first is wanted, but for
`settings`.

    KeyHandler -- Prompts -- a thread per open prompt -- agent.py     a terminal that runs `upcall prompt`
                  prompts.py                          -- pinentry.py  a dialog on the desktop
                  pins.py                             -- systemd.py   the password agents of systemd
                  passphrases.py

A prompt lives longer than the request that caused it: eCryptfs waits for 2.5 s, a person needs ten. So each prompt has
a thread of its own, which talks to one person at a time; requests wait for its end, or are refused with "prompting"
and find the PIN when they come again. The daemon's main thread only hands connections over.

A token counts wrong PINs and locks itself after a few, often three. So a PIN that nobody has tried yet is given to one
request at a time, the others wait for its verdict; a request that ends without one has used the PIN up; and after two
wrong ones nobody is asked until a person says `upcall key unlock`. No time resets that count: the token's has none.

A passphrase can be tried as often as one likes, so it is tried at once, by the prompt's thread: who has mistyped it is
told so and asked again. The key service keeps one that opens its key.
"""
