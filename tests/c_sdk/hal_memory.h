/* triple_hal.h without a network: the reply comes from memory, and time passes only when somebody waits. */
#ifndef HAL_MEMORY_H
#define HAL_MEMORY_H

#include <stddef.h>
#include <stdint.h>

/* The next connections: each answers `length` bytes in pieces of `piece`, then closes, or falls silent if `silent`. */
void memory_serve(const char *reply, size_t length, size_t piece, int silent);

/* What was sent on all connections since then, and on how many. */
extern char memory_sent[4096];
extern size_t memory_sent_length;
extern uint64_t memory_clock; /* what HAL_UptimeMs() counts on from; it goes back to 0 after 32 bits */
extern uint64_t memory_back;  /* by so much it is set back when something is next received */
extern unsigned memory_connections;

/* Let that many connections be refused first, and that many sends fail after their first byte. */
extern unsigned memory_refuse;
extern unsigned memory_break;

#endif
