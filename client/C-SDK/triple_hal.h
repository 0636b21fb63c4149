/* What triple_burn.c needs from the platform, and nothing else: a TCP socket with time limits, memory, time, a log line.
 *
 * hal_posix.c implements it for Linux and macOS, hal_template.c for AliOS Things and for FreeRTOS, both with lwIP.
 * The four functions without "Triple" have the names and types of the vendor's device SDK (Linkkit): firmware that
 * contains it has them already. */
#ifndef TRIPLE_HAL_H
#define TRIPLE_HAL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HAL_TRIPLE_ERROR (-1)   /* refused, unreachable, broken */
#define HAL_TRIPLE_TIMEOUT (-2) /* the time limit passed first */

/* Open a connection to `host` (address or name). Returns a socket, 0 or more, or one of the codes above.
 * What it waits for counts, the look-up of a name too where the platform can limit that. */
int HAL_Triple_Connect(const char *host, uint16_t port, uint32_t timeout_ms);

/* Send what the connection takes now. Returns the bytes taken, 1 to `length`, or one of the codes above.
 * A connection that the peer has closed must give HAL_TRIPLE_ERROR and raise no signal. */
int HAL_Triple_Send(int socket, const char *data, size_t length, uint32_t timeout_ms);

/* Wait for the first bytes and return as soon as some are there: 1 to `size`, 0 once the peer has closed, or a code. */
int HAL_Triple_Recv(int socket, char *buffer, size_t size, uint32_t timeout_ms);

void HAL_Triple_Close(int socket);

/* One line for the person at the console, without line end. It never holds a secret. */
void HAL_Triple_Log(const char *line);

void *HAL_Malloc(uint32_t size); /* NULL when there is none; only send_req() allocates */
void HAL_Free(void *pointer);    /* NULL is allowed */
void HAL_SleepMs(uint32_t ms);
uint64_t HAL_UptimeMs(void); /* never goes back; if it does by more than seconds, the request under way ends */

#ifdef __cplusplus
}
#endif

#endif
