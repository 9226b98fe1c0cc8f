/* Checks the broker's answer and decides how to answer the key. Pure. */
#ifndef UPCALL_DECIDE_H
#define UPCALL_DECIDE_H

#include <stddef.h>
#include <stdint.h>

enum { MAX_PAYLOAD = 32767 }; /* bytes: the limit of "user" keys, used for all types */
enum { RESPONSE_HEAD = 28, INSTANCE_HEAD = 4, MAX_RESPONSE = RESPONSE_HEAD + INSTANCE_HEAD + MAX_PAYLOAD };

struct decision {
	int refusal;            /* errno to reject the key with; if it is 0, instantiate the key with the rest: */
	uint32_t expiry;        /* seconds until the key expires; 0: never */
	const uint8_t *payload; /* points into the message */
	size_t size;            /* bytes of the payload */
};

/* `described`: the key's description, which begins with "type;". `message`: the broker's message; rejected with EPROTO
 * unless it is exactly one response to `seq`. */
struct decision decide(const char *described, size_t described_size, uint32_t seq, const uint8_t *message, size_t size);

/* Returns `code` if KEYCTL_REJECT accepts it, otherwise EIO. */
int rejectable(int code);

/* Returns the time-out to pass to the kernel for `seconds`. `gone`: nanoseconds since the clock's last full second. The
 * kernel counts whole seconds, the current one included. Rounding keeps the error within half a second, and the result
 * above 0. */
uint32_t as_counted(uint32_t seconds, long gone);

#endif
