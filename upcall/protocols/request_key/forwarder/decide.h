/* What to do with the broker's answer. Pure: bytes in, a decision out. */
#ifndef UPCALL_DECIDE_H
#define UPCALL_DECIDE_H

#include <stddef.h>
#include <stdint.h>

enum { MAX_PAYLOAD = 32767 }; /* of a "user" key, and we give no other type more */
enum { RESPONSE_HEAD = 28, INSTANCE_HEAD = 4, MAX_RESPONSE = RESPONSE_HEAD + INSTANCE_HEAD + MAX_PAYLOAD };

struct decision {
	int refusal;            /* the errno to reject the key with, or 0: */
	uint32_t expiry;        /* seconds, 0: none */
	const uint8_t *payload; /* within the message */
	size_t size;
};

/* `described` begins with "type;"; the message must be the answer to `seq`, whole and nothing more. */
struct decision decide(const char *described, size_t described_size, uint32_t seq, const uint8_t *message, size_t size);

/* An errno that KEYCTL_REJECT takes, or EIO. */
int rejectable(int code);

/* What to tell the kernel for `seconds`, when `gone` ns of its clock's second have. It counts whole seconds of that
 * clock, the present one included: this makes it half a second too much or too little, and never nothing. */
uint32_t as_counted(uint32_t seconds, long gone);

#endif
