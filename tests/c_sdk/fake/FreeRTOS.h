/* FreeRTOS, as far as hal_template.c uses it, on the host: a tick is a millisecond and the counter starts near its end. */
#ifndef FAKE_FREERTOS_H
#define FAKE_FREERTOS_H

#include <stdint.h>
#include <stdlib.h>
#include <time.h>

typedef uint32_t TickType_t;
typedef long BaseType_t;
typedef struct {
    BaseType_t xOverflowCount;
    TickType_t xTimeOnEntering;
} TimeOut_t;

#define configTICK_RATE_HZ ((TickType_t)1000)
#define portMAX_DELAY ((TickType_t)0xFFFFFFFF)

#define pvPortMalloc malloc
#define vPortFree free

#endif
