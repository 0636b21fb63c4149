#ifndef FAKE_TASK_H
#define FAKE_TASK_H

#include "FreeRTOS.h"

static inline void vTaskDelay(TickType_t ticks)
{
    struct timespec rest = {(time_t)(ticks / 1000), (long)(ticks % 1000) * 1000000L};

    nanosleep(&rest, NULL);
}

/* The first call is 100 ticks before the counter wraps. */
static inline void vTaskSetTimeOutState(TimeOut_t *state)
{
    static uint64_t began;
    struct timespec now;
    uint64_t ticks;

    clock_gettime(CLOCK_MONOTONIC, &now);
    ticks = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
    if (began == 0)
        began = ticks;
    ticks = ticks - began + portMAX_DELAY - 100;
    state->xOverflowCount = (BaseType_t)(ticks >> 32);
    state->xTimeOnEntering = (TickType_t)ticks;
}

#endif
