/* Fuzzes decide.c by libFuzzer. The first byte of the input selects the key's type, and whether the rest is a whole
 * message or the body of a valid one. Accepted payloads are checked again by independent code. */

#include "decide.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char *const DESCRIBED[] = {"cifs.spnego;0;0;39010000;ver=0x2", "dns_resolver;0;0;39010000;fs", "user;", ""};
enum { KEY = 123456789 };

static void put32(uint8_t *to, uint32_t value)
{
	memcpy(to, &value, sizeof value);
}

/* Prepends the head of an answer to a body. */
static void wrap(uint8_t *message, size_t size)
{
	memset(message, 0, RESPONSE_HEAD);
	put32(message, (uint32_t)size);
	message[4] = 103;
	put32(message + 8, KEY);
	put32(message + 20, (uint32_t)size - 24);
	message[24] = 1;
}

static void check_spnego(const uint8_t *payload, size_t size)
{
	uint32_t head[4];
	if (size < sizeof head)
		abort();
	memcpy(head, payload, sizeof head); /* on little-endian machines */
	if (head[0] != 2 || head[1] || head[2] < 16 || head[2] > 64 || head[3] < 16)
		abort();
	if ((uint64_t)head[2] + head[3] + sizeof head != size)
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size < 1)
		return 0;
	const char *described = DESCRIBED[data[0] & 3];
	size_t before = data[0] & 4 ? 0 : RESPONSE_HEAD, whole = before + size - 1;
	uint8_t *message = malloc(whole ? whole : 1); /* of the exact size: reads beyond it are detected */
	if (!message)
		return 0;
	memcpy(message + before, data + 1, size - 1);
	if (before)
		wrap(message, whole);
	struct decision made = decide(described, strlen(described), KEY, message, whole);
	if (made.refusal) {
		if (rejectable(made.refusal) != made.refusal)
			abort();
	} else {
		if (!made.size || made.size > MAX_PAYLOAD || made.payload < message || made.payload + made.size > message + whole)
			abort();
		if (described[0] == 'c')
			check_spnego(made.payload, made.size);
	}
	free(message);
	return 0;
}
