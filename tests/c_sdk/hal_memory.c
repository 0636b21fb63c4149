#include "hal_memory.h"

#include <stdlib.h>
#include <string.h>

#include "triple_burn.h"

char memory_sent[4096];
size_t memory_sent_length;
uint64_t memory_clock, memory_back;
unsigned memory_connections, memory_refuse, memory_break;

static const char *answer;
static size_t answer_length, answer_piece, answered;
static int answer_silent;

void memory_serve(const char *reply, size_t length, size_t piece, int silent)
{
    answer = reply;
    answer_length = length;
    answer_piece = piece;
    answer_silent = silent;
    memory_sent_length = 0;
    memory_connections = 0;
}

int HAL_Triple_Connect(const char *host, uint16_t port, uint32_t timeout_ms)
{
    (void)host;
    (void)port;
    (void)timeout_ms;
    memory_connections++;
    answered = 0;
    memory_clock++;
    if (memory_refuse > 0) {
        memory_refuse--;
        return HAL_TRIPLE_ERROR;
    }
    return 0;
}

int HAL_Triple_Send(int socket, const char *data, size_t length, uint32_t timeout_ms)
{
    (void)socket;
    (void)timeout_ms;
    memory_clock++;
    length = length < 50 ? length : 50;
    if (memory_break > 0) {
        memory_break--;
        return HAL_TRIPLE_ERROR;
    }
    if (memory_sent_length + length <= sizeof memory_sent)
        memcpy(memory_sent + memory_sent_length, data, length);
    memory_sent_length += length;
    return (int)length;
}

int HAL_Triple_Recv(int socket, char *buffer, size_t size, uint32_t timeout_ms)
{
    size_t count = answer_length - answered;

    (void)socket;
    memory_clock += 1 - memory_back;
    memory_back = 0;
    if (timeout_ms > TRIPLE_TOTAL_MS)
        abort();
    if (count == 0 && answer_silent) {
        memory_clock += timeout_ms;
        return HAL_TRIPLE_TIMEOUT;
    }
    count = count < answer_piece ? count : answer_piece;
    count = count < size ? count : size;
    if (count > 0)
        memcpy(buffer, answer + answered, count);
    answered += count;
    return (int)count;
}

void HAL_Triple_Close(int socket)
{
    (void)socket;
}

void HAL_Triple_Log(const char *line)
{
    if (strlen(line) > 200)
        abort();
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
    memory_clock += ms;
}

uint64_t HAL_UptimeMs(void)
{
    return memory_clock & UINT32_MAX;
}
