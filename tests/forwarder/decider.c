/* Calls decide() for records on standard input: {described_size, seq, message_size} (u32 each), described, message.
 * Prints a line for each: errno, expiry, offset of the payload, its size. Buffers have the exact size, so that
 * AddressSanitizer detects reads beyond them. */

#include "decide.h"

#include <stdio.h>
#include <stdlib.h>

static uint8_t *take(size_t size)
{
	uint8_t *taken = malloc(size ? size : 1);
	if (!taken || fread(taken, 1, size, stdin) != size)
		abort();
	return taken;
}

int main(void)
{
	uint32_t head[3];
	while (fread(head, sizeof head, 1, stdin) == 1) {
		uint8_t *described = take(head[0]), *message = take(head[2]);
		struct decision made = decide((const char *)described, head[0], head[1], message, head[2]);
		if (made.refusal)
			printf("%d 0 0 0\n", made.refusal);
		else
			printf("0 %u %td %zu\n", made.expiry, made.payload - message, made.size);
		free(described);
		free(message);
	}
	return 0;
}
