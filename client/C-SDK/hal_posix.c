/* triple_hal.h for Linux, macOS and other POSIX systems: programmers, and the tests of the SDK. */
#define _POSIX_C_SOURCE 200809L
#define _DARWIN_C_SOURCE /* SO_NOSIGPIPE, which _POSIX_C_SOURCE alone hides on macOS */

#include "triple_hal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* macOS, where SO_NOSIGPIPE on the socket does the same */
#endif

static uint32_t left_until(uint64_t end)
{
    uint64_t now = HAL_UptimeMs();

    return now < end ? (uint32_t)(end - now) : 0;
}

/* Wait until the socket is ready for `events`: 1, or a code. A signal does not make the wait longer. */
static int wait_for(int socket, short events, uint32_t timeout_ms)
{
    uint64_t end = HAL_UptimeMs() + timeout_ms;

    for (;;) {
        struct pollfd ready = {socket, events, 0};
        uint32_t left = left_until(end);
        int count = poll(&ready, 1, left < INT_MAX ? (int)left : INT_MAX);

        if (count > 0)
            return 1;
        if (count == 0)
            return HAL_TRIPLE_TIMEOUT;
        if (errno != EINTR)
            return HAL_TRIPLE_ERROR;
    }
}

/* poll() may have promised too much (Linux says so of select()): the socket is to be waited for again. */
static int not_yet(void)
{
    return errno == EAGAIN || errno == EINTR;
}

static int connect_to(const struct addrinfo *address, uint32_t timeout_ms)
{
    int fd = socket(address->ai_family, address->ai_socktype, address->ai_protocol), result = HAL_TRIPLE_ERROR, error = 0;
    socklen_t size = sizeof error;

    if (fd < 0)
        return HAL_TRIPLE_ERROR;
#ifdef SO_NOSIGPIPE
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &(int){1}, sizeof(int));
#endif
    if (fcntl(fd, F_SETFL, O_NONBLOCK) == 0) {
        if (connect(fd, address->ai_addr, address->ai_addrlen) == 0)
            return fd;
        if (errno == EINPROGRESS)
            result = wait_for(fd, POLLOUT, timeout_ms);
    }
    if (result == 1 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error == 0)
        return fd;
    close(fd);
    return result == HAL_TRIPLE_TIMEOUT ? HAL_TRIPLE_TIMEOUT : HAL_TRIPLE_ERROR;
}

/* The time limit is for the connection; looking up a name takes what the system's resolver takes. */
int HAL_Triple_Connect(const char *host, uint16_t port, uint32_t timeout_ms)
{
    const struct addrinfo wanted = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found, *address;
    uint64_t end = HAL_UptimeMs() + timeout_ms;
    char service[6];
    int result = HAL_TRIPLE_ERROR;

    snprintf(service, sizeof service, "%u", (unsigned)port);
    if (getaddrinfo(host, service, &wanted, &found) != 0)
        return HAL_TRIPLE_ERROR;
    for (address = found; address != NULL && result < 0; address = address->ai_next) {
        uint32_t left = left_until(end);

        if (address->ai_next != NULL) /* an address that does not answer leaves time for those behind it */
            left -= left / 2;
        result = left > 0 ? connect_to(address, left) : HAL_TRIPLE_TIMEOUT;
    }
    freeaddrinfo(found);
    return result;
}

int HAL_Triple_Send(int socket, const char *data, size_t length, uint32_t timeout_ms)
{
    uint64_t end = HAL_UptimeMs() + timeout_ms;

    for (;;) {
        int ready = wait_for(socket, POLLOUT, left_until(end));
        ssize_t sent = ready == 1 ? send(socket, data, length, MSG_NOSIGNAL) : 0;

        if (ready != 1)
            return ready;
        if (sent > 0)
            return (int)sent;
        if (sent == 0 || !not_yet())
            return HAL_TRIPLE_ERROR;
    }
}

int HAL_Triple_Recv(int socket, char *buffer, size_t size, uint32_t timeout_ms)
{
    uint64_t end = HAL_UptimeMs() + timeout_ms;

    for (;;) {
        int ready = wait_for(socket, POLLIN, left_until(end));
        ssize_t got = ready == 1 ? recv(socket, buffer, size, 0) : 0;

        if (ready != 1)
            return ready;
        if (got >= 0)
            return (int)got;
        if (!not_yet())
            return HAL_TRIPLE_ERROR;
    }
}

void HAL_Triple_Close(int socket)
{
    close(socket);
}

void HAL_Triple_Log(const char *line)
{
    fprintf(stderr, "%s\n", line);
}

void *HAL_Malloc(uint32_t size)
{
    return malloc(size);
}

void HAL_Free(void *pointer)
{
    free(pointer);
}

void HAL_SleepMs(uint32_t ms)
{
    struct timespec rest = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000L};

    while (nanosleep(&rest, &rest) != 0 && errno == EINTR)
        continue;
}

uint64_t HAL_UptimeMs(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}
