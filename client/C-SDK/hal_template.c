/* triple_hal.h for AliOS Things (BUILD_AOS is defined) and for FreeRTOS, both with lwIP.
 *
 * To port it:
 *   1. Add this file instead of hal_posix.c. lwIP needs LWIP_SOCKET 1, and LWIP_DNS 1 where the server has a name;
 *      without it the server's IPv4 address is taken alone.
 *   2. Firmware with the vendor's device SDK has HAL_Malloc, HAL_Free, HAL_SleepMs and HAL_UptimeMs: define
 *      TRIPLE_HAL_FROM_SDK, and only the socket functions and the log line are built from here. Look at its
 *      HAL_UptimeMs() first: where an old one returns uint32_t, half of what is read here would be garbage.
 *   3. On another RTOS replace the five definitions under "System"; on another TCP/IP stack the "Sockets" part.
 *   4. Call it from a task that may block, once the device has its IP address. README.md states the stack it needs. */
#include "triple_hal.h"

#include <string.h>

#include "lwip/sockets.h"

#if LWIP_DNS /* lwIP's netdb.h is empty without */
#include "lwip/netdb.h"
#endif

/* ---- System ------------------------------------------------------------------------------------------------------- */

#if defined(BUILD_AOS)

#include <aos/cli.h>
#include <aos/kernel.h>

#define LOG_LINE(line) aos_cli_printf("%s\r\n", (line))
#define MALLOC(size) aos_malloc((size))
#define FREE(pointer) aos_free((pointer))
#define SLEEP_MS(ms) aos_msleep((int)(ms))
#define UPTIME_MS() ((uint64_t)aos_now_ms())

#else

#include <stdio.h>

#include "FreeRTOS.h"
#include "task.h"

#define LOG_LINE(line) ((void)printf("%s\r\n", (line)))
#define MALLOC(size) pvPortMalloc((size))
#define FREE(pointer) vPortFree((pointer))
#define SLEEP_MS(ms) vTaskDelay((TickType_t)(((uint64_t)(ms) * configTICK_RATE_HZ + 999) / 1000))
#define UPTIME_MS() uptime_ms()

#if !defined(TRIPLE_HAL_FROM_SDK)

/* The tick counter may wrap within weeks; FreeRTOS counts how often it did. */
static uint64_t uptime_ms(void)
{
    TimeOut_t now;
    uint64_t ticks;

    vTaskSetTimeOutState(&now);
    ticks = (uint64_t)now.xOverflowCount * ((uint64_t)portMAX_DELAY + 1) + now.xTimeOnEntering;
    return ticks / configTICK_RATE_HZ * 1000 + ticks % configTICK_RATE_HZ * 1000 / configTICK_RATE_HZ;
}

#endif

#endif

void HAL_Triple_Log(const char *line)
{
    LOG_LINE(line);
}

#if !defined(TRIPLE_HAL_FROM_SDK)

void *HAL_Malloc(uint32_t size)
{
    return MALLOC(size);
}

void HAL_Free(void *pointer)
{
    FREE(pointer);
}

void HAL_SleepMs(uint32_t ms)
{
    SLEEP_MS(ms);
}

uint64_t HAL_UptimeMs(void)
{
    return UPTIME_MS();
}

#endif

/* ---- Sockets ------------------------------------------------------------------------------------------------------ */

/* Wait until the socket can be read, or else written: 1, or a code. */
static int wait_for(int socket, int reading, uint32_t timeout_ms)
{
    fd_set set;
    struct timeval limit;
    int count;

    FD_ZERO(&set);
    FD_SET(socket, &set);
    limit.tv_sec = (long)(timeout_ms / 1000);
    limit.tv_usec = (long)(timeout_ms % 1000 * 1000);
    count = lwip_select(socket + 1, reading ? &set : NULL, reading ? NULL : &set, NULL, &limit);
    if (count == 0)
        return HAL_TRIPLE_TIMEOUT;
    return count > 0 ? 1 : HAL_TRIPLE_ERROR;
}

/* Fill in the address of `host`: 1, or a code. A look-up takes as long as lwIP lets it. */
static int find_host(const char *host, struct sockaddr_in *address)
{
#if LWIP_DNS
    struct addrinfo wanted, *found = NULL;

    memset(&wanted, 0, sizeof wanted);
    wanted.ai_family = AF_INET;
    wanted.ai_socktype = SOCK_STREAM;
    if (lwip_getaddrinfo(host, NULL, &wanted, &found) != 0 || found == NULL)
        return HAL_TRIPLE_ERROR;
    memcpy(address, found->ai_addr, sizeof *address);
    lwip_freeaddrinfo(found);
    return 1;
#else
    memset(address, 0, sizeof *address);
    address->sin_family = AF_INET;
    return inet_aton(host, &address->sin_addr) != 0 ? 1 : HAL_TRIPLE_ERROR;
#endif
}

int HAL_Triple_Connect(const char *host, uint16_t port, uint32_t timeout_ms)
{
    struct sockaddr_in address;
    int fd, result, error = 0;
    socklen_t size = sizeof error;

    if (find_host(host, &address) != 1)
        return HAL_TRIPLE_ERROR;
    address.sin_port = lwip_htons(port);

    fd = lwip_socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0)
        return HAL_TRIPLE_ERROR;
    /* The state of a connection under way is asked for with select(): errno is not per task on every port. */
    result = lwip_fcntl(fd, F_SETFL, O_NONBLOCK) < 0 ? HAL_TRIPLE_ERROR : 1;
    if (result == 1 && lwip_connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
        result = wait_for(fd, 0, timeout_ms);
    if (result == 1 && (lwip_getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0))
        result = HAL_TRIPLE_ERROR;
    if (result == 1)
        return fd;
    lwip_close(fd);
    return result;
}

int HAL_Triple_Send(int socket, const char *data, size_t length, uint32_t timeout_ms)
{
    int result = wait_for(socket, 0, timeout_ms);

    if (result == 1)
        result = (int)lwip_send(socket, data, length, 0);
    return result != 0 ? result : HAL_TRIPLE_ERROR;
}

int HAL_Triple_Recv(int socket, char *buffer, size_t size, uint32_t timeout_ms)
{
    int result = wait_for(socket, 1, timeout_ms);

    return result == 1 ? (int)lwip_recv(socket, buffer, size, 0) : result;
}

void HAL_Triple_Close(int socket)
{
    lwip_close(socket);
}
